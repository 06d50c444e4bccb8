"""HTTP mechanics: request parsing, negotiation, problem documents, middleware, the OpenAPI document and the pages.

Read `requests.py` first.
"""
