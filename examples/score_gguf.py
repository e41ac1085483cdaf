"""Score an answer with a student that was exported for llama.cpp; nothing of mlx-fd is needed.

    mlx-fd export RUN --format gguf --out student
    pip install llama-cpp-python gguf
    python examples/score_gguf.py student/model-f16.gguf PROBLEM ANSWER

The score head is in the file's metadata, and reads llama.cpp's embedding (without pooling) of the
prompt's last token, or, where it was trained so, of the last but one of the feedback.
"""

import sys

import gguf
import llama_cpp
import numpy as np

file, problem, answer = sys.argv[1:]
fields = gguf.GGUFReader(file).fields
head = {key: fields[key].contents() for key in fields if key.startswith("mlx_fd.score_head.")}
weight, bias, score_at, before, between, after, most = (
    head[f"mlx_fd.score_head.{name}"]
    for name in ("weight", "bias", "score_at", "before", "between", "after", "max_tokens")
)
# A chat's turn often ends with another token than the tokenizer's eos, and there may be many.
named = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
ends = {fields[name].contents() for name in named if name in fields}
if "mlx_fd.end_token_ids" in fields:
    ends.update(fields["mlx_fd.end_token_ids"].contents())
penalty = float(head.get("mlx_fd.score_head.repetition_penalty", 1))


def penalise(seen, logits):
    """What a student was told of tokens that are there already; llama.cpp's rule spares prompts."""
    seen = np.unique(seen)
    logits[seen] *= np.where(logits[seen] < 0, penalty, 1 / penalty)
    return logits


llm = llama_cpp.Llama(file, n_ctx=2048, embedding=True, pooling_type=0, verbose=False)  # 0: none
text = before + problem.strip() + between + answer.strip() + after
tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
if score_at != "prompt":  # it reads its own feedback, too
    reply = llm.generate([*tokens], temp=0.0, repeat_penalty=1.0, logits_processor=[penalise])
    for written, token in enumerate(reply, 1):
        if token in ends or written == int(most):
            break
        tokens.append(token)
llm.reset()
llm.eval(tokens)
hidden = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(llm.ctx, -1), (len(weight),))
print(f"{np.tanh(weight @ hidden + bias):+.4f}")  # from -1, harmful, to 1, excellent
