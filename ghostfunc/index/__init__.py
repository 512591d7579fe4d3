"""An index of a corpus: every sample's projected gradient on disk, in the data's order, to be searched and looked at."""
