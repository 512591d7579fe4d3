"""The Pile's domains, and where the token file of a domain lies."""

from ghostfunc.text import SPLITS, domain_file, domain_file_name, split_folder

__all__ = ["PILE_DOMAINS", "SPLITS", "domain_file", "domain_file_name", "split_folder"]

PILE_DOMAINS = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)
