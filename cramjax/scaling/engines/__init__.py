"""Where trials run. An engine takes names of trials and yields each when its process has ended, however it ended.

What came of a trial is in its directory; engines carry no results.
"""
