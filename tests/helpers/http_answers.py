"""Answers of the local http servers that tests download from."""


def answer(content, status=200, **headers):
    """A function of a request's handler that sends `content`."""

    def respond(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return respond
