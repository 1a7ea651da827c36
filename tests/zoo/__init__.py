"""Small networks in the coding styles of published binary networks, each with its taps stated by hand."""
