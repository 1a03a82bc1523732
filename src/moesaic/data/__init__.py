"""Texts in, labelled token streams out: domains with document-level train/validation splits."""

from moesaic.data.domain import Domain, split_documents
from moesaic.data.installed import INSTALLED_DOMAINS, installed_domain, installed_domains
from moesaic.data.sources import load_domains, parse_domain
from moesaic.data.tokens import DomainTokens, TokenBatches, tokenize_domains

__all__ = [
    "INSTALLED_DOMAINS",
    "Domain",
    "DomainTokens",
    "TokenBatches",
    "installed_domain",
    "installed_domains",
    "load_domains",
    "parse_domain",
    "split_documents",
    "tokenize_domains",
]
