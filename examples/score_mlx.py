"""Score an answer with a student that was exported for mlx-lm; nothing of mlx-fd is needed.

mlx-fd export RUN --out student
python examples/score_mlx.py student PROBLEM ANSWER
"""

import sys

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_repetition_penalty

folder, problem, answer = sys.argv[1:]
model, tokenizer = mlx_lm.load(folder)
head, about = mx.load(f"{folder}/score_head.safetensors", return_metadata=True)
text = about["before"] + problem.strip() + about["between"] + answer.strip() + about["after"]
tokens = tokenizer.encode(text, add_special_tokens=False)
if about["score_at"] != "prompt":  # it reads its own feedback, too
    most = int(about["max_tokens"])
    # Of all tokens: mlx-lm's own rule is not given the prompt.
    penalise = make_repetition_penalty(float(about.get("repetition_penalty", 1)), 1 << 20)
    rules = [lambda seen, logits: penalise(mx.concatenate([mx.array(tokens), seen]), logits)]
    feedback = mlx_lm.stream_generate(
        model, tokenizer, tokens, max_tokens=most, logits_processors=rules
    )
    tokens += [piece.token for piece in feedback][:-1]
hidden = model.model(mx.array([tokens]))[0, -1].astype(mx.float32)
print(f"{mx.tanh(head['weight'] @ hidden + head['bias']).item():+.4f}")  # -1 harmful, 1 excellent
