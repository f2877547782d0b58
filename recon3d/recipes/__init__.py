"""recon3d.recipes"""
