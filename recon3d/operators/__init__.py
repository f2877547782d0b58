"""recon3d.operators"""
