"""The set of settings is stored: each is something that a user must learn, so a new one is a visible change."""

from pathlib import Path

from mpilm.config import Config, flatten

STORED = Path(__file__).with_name("settings.txt")
CEILING = 93


def test_the_settings_are_the_stored_ones() -> None:
    stored, real = STORED.read_text().split(), sorted(flatten(Config()))
    new, gone = sorted(set(real) - set(stored)), sorted(set(stored) - set(real))
    assert real == stored, (
        f"new settings {new}, settings that are gone {gone}. A setting earns its place (design, section 3): can a better "
        "mechanism do without it? If it stays, write it into tests/arch/settings.txt, which is sorted, one name a line, "
        "and say in the commit who needs it."
    )


def test_there_are_few_enough() -> None:
    assert len(flatten(Config())) <= CEILING
