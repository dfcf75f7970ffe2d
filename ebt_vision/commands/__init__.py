"""The commands of the command line: each module adds its arguments to a parser and runs what they ask for."""
