"""Damaged files for minutes on end, and one kept of each way in which reading them ends.

`python tests/reliability/fuzz.py --seconds 600 --reader scores configurations images` adds to the corpus, which the
tests read again. Anything but a documented error ends it, with the file that made it in the corpus.
"""

import argparse
import hashlib
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability import test_untrusted_input as untrusted

BATCH = settings(
    max_examples=2000,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def contents(reader: str) -> st.SearchStrategy[bytes]:
    """What a reader is given: whole files, damaged, and of configurations any text, too."""
    if reader == "configurations":
        return untrusted.TEXT
    whole = [untrusted.score_file()] if reader == "scores" else untrusted.IMAGES
    return st.builds(lambda content, damage: damage.of(content), st.sampled_from(whole), untrusted.DAMAGE)


def kind(outcome: str) -> str:
    """What does not depend on the places and numbers of a message."""
    return re.sub(r"""0x[0-9a-f]+|\d+|'[^']*'|"[^"]*"|b'.*'""", "#", outcome)[:90]


def fuzz(reader: str, seconds: float, corpus: Path) -> tuple[int, int]:
    """How many files were tried, and how many ways to end are known."""
    read, tried = untrusted.READERS[reader], 0
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = {kind(read(folder, file.read_bytes())) for file in sorted(corpus.iterdir())}
        until = time.monotonic() + seconds

        def keep(content: bytes) -> None:
            (corpus / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)

        while time.monotonic() < until:

            @seed(secrets.randbits(64))
            @BATCH
            @given(contents(reader))
            def batch(content: bytes) -> None:
                nonlocal tried
                tried += 1
                try:
                    found = kind(read(folder, content))
                except Exception:
                    keep(content)
                    raise
                if found not in known:
                    known.add(found)
                    keep(content)

            batch()
    return tried, len(known)


def main() -> None:
    """Fuzzes each reader for as long, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--reader", nargs="+", choices=untrusted.READERS, default=list(untrusted.READERS))
    options = parser.parse_args()
    for reader in options.reader:
        tried, ends = fuzz(reader, options.seconds, untrusted.CORPUS / reader)
        print(f"{reader}: {tried} files in {options.seconds:.0f} s, {ends} ways to end, no other error", flush=True)


if __name__ == "__main__":
    main()
