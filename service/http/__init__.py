"""HTTP mechanics: request parsing, negotiation, problem documents, middleware, the OpenAPI document and the pages.

It contains nothing specific to jobs or models. Read `requests.py` first.
"""
