"""HTTP mechanics: request parsing, negotiation, problem documents, middleware, the OpenAPI document and the pages.

It knows neither jobs nor models. Read `requests.py` first.
"""
