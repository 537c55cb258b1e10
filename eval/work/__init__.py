"""The work behind the scripts of eval/, loaded by name once flags are parsed."""
