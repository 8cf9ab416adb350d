"""Commands of the `mm` program, a file each: `main(argv) -> exit status`."""
