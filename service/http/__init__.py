"""HTTP mechanics: requests, negotiation, problem documents, middleware, the OpenAPI document and the pages.

Does not know jobs or the queue. Read `requests` first.
"""
