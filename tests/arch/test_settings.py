"""The stored list of settings: users must learn each of them, so a new one is a visible change."""

from pathlib import Path

from mpilm.config.schema import Config
from mpilm.config.settings import flatten

STORED = Path(__file__).with_name("settings.txt")
CEILING = 110


def test_settings_equal_the_stored_list() -> None:
    stored, real = STORED.read_text().split(), sorted(flatten(Config()))
    new, gone = sorted(set(real) - set(stored)), sorted(set(stored) - set(real))
    assert real == stored, (
        f"new settings {new}, missing settings {gone}. A setting must earn its place (design, section 3): can a better "
        "mechanism do without it? If it stays, add it to tests/arch/settings.txt, which is sorted, one name per line, "
        "and say in the commit who needs it. A renamed one also belongs in OLD_NAMES of mpilm/config/old_names.py."
    )


def test_settings_stay_below_the_ceiling() -> None:
    assert len(flatten(Config())) <= CEILING
