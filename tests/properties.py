"""Property tests: how many examples each draws, and under which profile.

Owns the two profiles of hypothesis. "fixed" is the test command's: the same examples at every run, so that it never
fails by chance. "random" draws other examples each time, ten times as many:

    scripts/run_tests.sh --hypothesis-profile=random -m hypothesis
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def register_profiles() -> None:
    """Register both and load "fixed"; pytest's option --hypothesis-profile names another."""
    # Neither may fail because the machine is busy.
    timeless = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("fixed", timeless, derandomize=True, database=None)
    settings.register_profile("random", timeless, derandomize=False, max_examples=1000, print_blob=True)
    settings.load_profile("fixed")


def examples(number: int, *accepted: HealthCheck) -> settings:
    """A decorator: draw `number` examples (hypothesis' own default is 100), in proportion more where a profile asks."""
    suppressed = [*settings().suppress_health_check, *accepted]
    return settings(max_examples=number * settings().max_examples // 100, suppress_health_check=suppressed)
