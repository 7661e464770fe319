"""A server of predictions over HTTP: one model, concurrent requests in batches, a page to try it.

It needs the packages of the extra `serve`: FastAPI, uvicorn and prometheus-client.
"""
