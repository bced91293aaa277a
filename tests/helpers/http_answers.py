"""Responses of the local HTTP servers that tests download from."""

import time


def answer(content, status=200, **headers):
    """A function that sends `content` through the handler of a request."""

    def respond(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def answer_endlessly(chunk, pause=0.0):
    """A function of a request's handler that sends `chunk` again and again, with `pause` seconds in between."""

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
