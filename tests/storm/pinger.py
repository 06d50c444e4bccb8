"""Request a URL repeatedly until standard input ends, then print the seconds that each response took.

It is a separate process, so that the interpreter lock of a load generator does not distort the result.
"""

import http.client
import json
import sys
import threading
import time


def main(host: str, port: int, path: str, every_s: float) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    connection = http.client.HTTPConnection(host, port, timeout=30)
    took: list[float] = []
    while not over.wait(every_s):
        began = time.perf_counter()
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        took.append(time.perf_counter() - began)
    print(json.dumps(took))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
