"""Ask a server that runs `mlx-fd serve --student RUN --expert NAME`: whole, as a stream, feedback.

Run `pip install openai`, then `python examples/ask_server.py [ADDRESS]`.
"""

import os
import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
client = OpenAI(base_url=f"{address}/v1", api_key=os.environ.get("MLX_FD_API_KEY", "none"))
question = "Tom has 8 apples. Tom buys 5 more apples. How many apples are left?"
messages = [{"role": "user", "content": question}]

reply = client.chat.completions.create(model="cascade", messages=messages)
print(reply.choices[0].message.content)
print(f"-- {reply.mlx_fd['answered_by']}: {reply.mlx_fd['reason']}\n")

for chunk in client.chat.completions.create(model="student", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print("\n")

answer = "Step 1: <<8+5=14>>14\n#### 14"
body = {"problem": question, "answer": answer}
found = client.post("/feedback", cast_to=object, body=body)
print(f"{found['score']:+.2f} {found['feedback']}")
