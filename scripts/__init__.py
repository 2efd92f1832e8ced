"""Thin command lines over hbp_titan: run as files in a checkout, installed as hbp_titan.scripts."""
