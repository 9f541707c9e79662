"""Questions about a model that take many steps: methods compared, one page of all, an installation diagnosed."""
