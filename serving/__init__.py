"""What the adapters of all engines share: request parameters, server defaults, metrics. No engine here."""
