"""The parts of the page, one file each: what is shown, how it is worded, which tables stand beside the charts."""
