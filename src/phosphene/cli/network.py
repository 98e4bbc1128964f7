"""The command that lists a network: `layers`."""

import json

from phosphene.cli.options import AsJson, OpenModel, Quiet, takes_model
from phosphene.cli.output import to_stdout


@takes_model
def layers(open_model: OpenModel, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List a network's layers: path, kind, channels, map size, receptive field, in-place operation after it."""
    model = open_model()
    table = model.layers()
    to_stdout(json.dumps({"model": model.name, "layers": table.to_json()}) if as_json else table)
