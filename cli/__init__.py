"""The `llamajax` command. Installs as `llamajax_cli`: a top-level module named `cli` would collide with others."""
