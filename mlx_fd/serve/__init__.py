"""The server: an OpenAI-compatible endpoint where the student answers and an expert is passed to.

One thread owns the models (:mod:`mlx_fd.serve.engine`); the asyncio side (:mod:`mlx_fd.serve.app`)
talks to it by queues. Who answers is decided in :mod:`mlx_fd.serve.cascade`.
"""
