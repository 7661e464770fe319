"""Training: settings, recipes, the loop, its output folder; label trees and rankers."""
