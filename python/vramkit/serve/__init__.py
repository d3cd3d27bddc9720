"""Servers for models: `vramkit serve chatterbox`, or `uvicorn vramkit.serve.chatterbox:app`.

They need the extra `serve` (FastAPI, uvicorn, pydantic-settings, prometheus-client).
"""
