"""An OpenAI-compatible server for tests, that fails as it is told to: on a port of its own, in a thread."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator


class AnswerServer:
    """What the server got, and how it behaves.

    `behave(number, body)` returns None to answer, a status code to refuse, "hang", "garbage", an object to send as JSON
    with status 200, or a function of the handler that does everything itself.
    """

    def __init__(self, behave: Callable[[int, dict], object], reply: Callable[[str], str]):
        self.behave, self.reply = behave, reply
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    @contextlib.contextmanager
    def served(self) -> Iterator["AnswerServer"]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def _handler(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.running += 1
                    outer.most_at_once = max(outer.most_at_once, outer.running)
                try:
                    self._answer(outer.behave(number, body), body)
                finally:
                    with outer.lock:
                        outer.running -= 1

            def _answer(self, how, body):
                if callable(how):
                    how(self)
                    return
                if how == "hang":
                    time.sleep(1.0)
                if isinstance(how, int):
                    self.send_response(how)
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(b"refused")
                    return
                chat = "messages" in body
                text = outer.reply(body["messages"][-1]["content"] if chat else body["prompt"])
                one = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
                choices = [{**one, "finish_reason": "stop"}] * body.get("n", 1)
                answer = how if isinstance(how, (dict, list)) else {"choices": choices}
                content = b"<html>" if how == "garbage" else json.dumps(answer).encode()
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has given up
                    self.wfile.write(content)

        return Handler
