"""What `svcli profile` finds on the bundled model with the pictures in examples/. Writes results/profile.json.

python -m benchmarks.profile
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import RESULTS, surroundings, write_results
from svcli.commands.profile import facts
from svcli_engines.images import open_image
from svcli_export.agreement import CHECK_QUESTION
from svcli_export.profiling import measure_pictures
from svcli_export.source import read_source

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "profile.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/skipvision-tiny", help="inside the repository")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    results: dict[str, Any] = surroundings(torch.get_num_threads()) | {"model": options.model}
    files = sorted((ROOT / "examples").glob("*.png"))
    pictures = [open_image(file).image for file in files]
    found = facts(measure_pictures(read_source(ROOT / options.model), pictures, CHECK_QUESTION))
    results |= {"question": CHECK_QUESTION, "pictures": [str(file.relative_to(ROOT)) for file in files]} | found
    write_results(results, options.result)
    print(options.result)


if __name__ == "__main__":
    main()
