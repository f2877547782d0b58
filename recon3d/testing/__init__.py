"""recon3d.testing"""
