"""All of scikit-learn's checks of an estimator as one assertion."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import check_estimator


def assert_contract(estimator: Any, known_failures: dict[str, str] | None = None) -> None:
    """Every check passes, except the known failures, each of which must fail. All failures are listed."""
    known = known_failures or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(estimator, expected_failed_checks=known, on_skip=None, on_fail=None)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for check in results:
        found[check["status"]][check["check_name"]] = check["exception"]
    failed = [f"{name}: {exception!r}" for name, exception in found["failed"].items()]
    assert not failed, "\n".join([f"{estimator} fails", *failed])
    assert len(found["passed"]) > 30, "few checks ran"
    assert found["xfail"].keys() == known.keys(), "a known failure did not fail"
