"""Signals that a run sends itself."""

import io
import os


class Trigger(io.StringIO):
    """Standard error that sends this process a signal when a line has this text, once."""

    def __init__(self, text, number):
        super().__init__()
        self.text, self.number = text, number

    def write(self, text):
        if self.text and self.text in text:
            self.text = None
            os.kill(os.getpid(), self.number)
        return super().write(text)
