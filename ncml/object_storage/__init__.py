"""Files in object storage (`s3://`, `gs://`, `hf://` and `https://`), through fsspec.

`remote_paths.py` has what commands use, `filesystems.py` the requests. Imports fsspec and its packages at the first
request.
"""

from ncml.object_storage.remote_paths import AHEAD, StoragePath, is_address, read_ahead

__all__ = ["AHEAD", "StoragePath", "is_address", "read_ahead"]
