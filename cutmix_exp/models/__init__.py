"""Networks. Each is a config part (`Model`) that builds a plain `nn.Module`."""
