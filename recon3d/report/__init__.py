"""recon3d.report"""
