"""What a command imports, imported once: `support.shell` forks commands from such a process."""

import gc
import os
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import pytest  # noqa: F401  # multiprocessing imports the parent's main module into each fork

# Tokenizers would start threads for a text's parts.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mlx_fd
from mlx_fd.models.backend import backend
from mlx_fd.models.chat_template import ChatTemplate, fitted
from mlx_fd.models.resolve import resolve
from mlx_fd.models.tokenizer import open_template
from mlx_fd.problems import arithmetic
from mlx_fd.problems.sources import gsm8k
from support.tiny import CHAT_TEMPLATE

backend()
for module in pkgutil.walk_packages(mlx_fd.__path__, "mlx_fd."):
    if module.name != "mlx_fd.__main__":
        import_module(module.name)

# A process reads these once.
for split in ("train", "test"):
    gsm8k.load(split)
    arithmetic.load(split)

# Nor does it try a chat template twice, which takes a process.
for name in ("tiny", "tiny-student"):
    open_template(resolve(name))
tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
for more in ({}, {"unk_token": "<|endoftext|>"}):  # of support.tiny's llama and qwen2
    fitted(ChatTemplate(CHAT_TEMPLATE, tokens | more))

# A fork shares all this, and its collector need not look through it.
gc.freeze()

# A fork has one thread; where there are more, it would wait for them for ever.
if sys.platform == "linux":
    assert len([*Path("/proc/self/task").iterdir()]) == 1
