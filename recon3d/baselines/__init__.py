"""recon3d.baselines"""
