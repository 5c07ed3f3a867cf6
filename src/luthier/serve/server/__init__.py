"""An OpenAI-compatible server for what was tuned.

`models.py` loads runs, those with LoRA on one base side by side; `engine.py` writes all requests in one
batch, which they join and leave at any token, in a thread of its own; `protocol.py` is OpenAI's form of
requests and answers; `app.py` the routes, and who is answered; `run.py` starts and ends all of it;
`hand_over.py` starts vLLM or llama.cpp instead.
"""
