"""The interface is what its OpenAPI document says: schemathesis makes requests of it, right ones and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from svcli.server.limits import MAX_NAME, Limits
from tests.server.conftest import NAME, SECONDS, Opener, question

PATHS = {
    "/v1/chat/completions",
    "/v1/svcli/look",
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/metrics",
}
EXAMPLES = {GenerationMode.POSITIVE: 40, GenerationMode.NEGATIVE: 100}
"""Of each operation."""

load_all_checks()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(inside: Opener, mode: GenerationMode) -> None:
    server = inside(limits=Limits(seconds=SECONDS, max_tokens=3))
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", server.gate)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == PATHS
    statuses = set()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing can be wrong with it

        @seed(6)
        @settings(
            max_examples=EXAMPLES[mode],
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case: Any) -> None:
            model = case.body.get("model") if isinstance(case.body, dict) else None
            if isinstance(model, str) and len(model) <= MAX_NAME:  # or else its length is what is wrong
                case.body["model"] = NAME
            # What a schema cannot say, such as that a question comes last, is refused all the same.
            statuses.add(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

        call()
    assert statuses <= {200, 400, 404, 415}
    assert 400 in statuses
    assert server.post(question()).status_code == 200
