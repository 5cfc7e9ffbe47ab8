"""From words to trials: the command line and a sweep file become a Plan. Imports neither torch nor ray."""
