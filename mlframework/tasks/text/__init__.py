"""Tasks of text: predict how a source goes on from what it has said."""
