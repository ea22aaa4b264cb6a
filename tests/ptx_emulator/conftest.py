"""Makes the modules beside the tests importable, and keeps what they run if that is asked for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emulator_recording

emulator_recording.install()
