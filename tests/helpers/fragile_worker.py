"""A worker that does not survive. It has a file of its own since another process must import it,
which cannot import files of tests."""

from __future__ import annotations

import faulthandler
import os
import time

from onnx_fuzz import Outcome


def serve(connection, models, log):
    """Dies of seed 1, hangs at seed 2."""
    faulthandler.enable(os.open(log, os.O_WRONLY))
    connection.send(None)
    while (seed := connection.recv()) is not None:
        if seed == 1:
            os._exit(3)
        if seed == 2:
            time.sleep(60)
        connection.send(Outcome(seed, "", "survived"))
