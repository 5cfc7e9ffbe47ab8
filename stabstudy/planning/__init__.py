"""The plan of a launch, from the command line and a sweep file to trials. Imports neither torch nor ray."""
