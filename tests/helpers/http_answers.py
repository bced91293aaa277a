"""Responses of the local HTTP servers that tests download from."""

import time


def answer(content, status=200, **headers):
    """Returns a function that responds to a request with `content`."""

    def respond(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def answer_endlessly(chunk, pause=0.0):
    """Returns a function that responds to a request with `chunk` repeated without end, `pause` seconds apart."""

    def respond(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(chunk)
                time.sleep(pause)
        except OSError:
            pass

    return respond
