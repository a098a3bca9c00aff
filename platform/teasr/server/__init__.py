"""Serving pictures: a queue that is worked on in batches, reloading, limits, metrics and a page.

`run.serve` is the server of the command line; `app.build_app` the same as an ASGI application.
"""
