"""recon3d.priors"""
