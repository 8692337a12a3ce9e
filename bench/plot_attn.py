#!/usr/bin/env python3
"""Draw what bench_attn measured: TOPS over tokens, a panel for each head dimension and mask.

    plot_attn.py FILE.tsv [docs/bench_attn.svg]
"""
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 380, 240, 60, 50, 70, 70
COLORS = {"sage_int8_fp8": "#c0392b", "sage_int8_fp16": "#e67e22", "cudnn": "#2c3e50",
          "fa2": "#7f8c8d", "fa3_fp16": "#2980b9", "fa3_fp8": "#8e44ad", "sa1_triton": "#27ae60",
          "sa2_sm90": "#16a085"}


def read(path):
    """{(head_dim, causal): {(contender, part): [(tokens, tops)]}} of the grid, and the comments."""
    panels, title, columns = {}, "", None
    with open(path) as file:
        for line in file:
            fields = line.rstrip("\n").split("\t")
            if line.startswith("#"):
                title = title or line[1:].strip()
            elif columns is None:
                columns = fields
            else:
                row = dict(zip(columns, fields))
                if row["row"] == "grid":
                    lines = panels.setdefault((int(row["head_dim"]), row["causal"]), {})
                    lines.setdefault((row["contender"], row["part"]), []).append(
                        (int(row["nq"]), float(row["tops"])))
    return panels, title


def text(x, y, words, anchor="middle", size=12, extra=""):
    return (f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}" {extra}>'
            f"{escape(words)}</text>")


def step_of(top):
    return next(s for s in (50, 100, 200, 250, 500, 1000) if top / s <= 8)


def panel(x0, y0, name, lines, tokens, top):
    step = step_of(top)
    top = max(-(-top // step), 1) * step

    def at(n, tops):
        i = tokens.index(n)
        return (x0 + WIDTH * (i + 0.5) / len(tokens), y0 + HEIGHT * (1 - tops / top))
    yield f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    yield text(x0 + WIDTH / 2, y0 - 8, name, size=14)
    for tops in range(0, int(top) + 1, step):
        y = at(tokens[0], tops)[1]
        yield f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
        yield text(x0 - 6, y + 4, str(tops), "end", 11)
    for n in tokens:
        yield text(at(n, 0)[0], y0 + HEIGHT + 16, f"{n // 1024}K" if n >= 1024 else str(n), size=11)
    for (contender, part), points in lines.items():
        color = COLORS.get(contender, "#000")
        dash = ' stroke-dasharray="6 4"' if part == "kernel" else ""
        path = " ".join("{:.1f},{:.1f}".format(*at(*p)) for p in sorted(points))
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        for p in points:
            x, y = at(*p)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'


def legend(names, y):
    x = LEFT
    for contender, part in names:
        dash = ' stroke-dasharray="6 4"' if part == "kernel" else ""
        words = f"{contender} {'alone' if part == 'kernel' else 'everything included'}"
        yield (f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" stroke-width="2" '
               f'stroke="{COLORS.get(contender, "#000")}"{dash}/>')
        yield text(x + 34, y + 4, words, "start")
        x += 290
        if x > LEFT + 2 * WIDTH - 100:
            x, y = LEFT, y + 20


def draw(panels, title):
    names = sorted({name for lines in panels.values() for name in lines})
    all_points = [p for lines in panels.values() for points in lines.values() for p in points]
    tokens = sorted({n for n, _ in all_points})
    top = max(tops for _, tops in all_points)
    rows = (len(panels) + 1) // 2
    foot = TOP + rows * (HEIGHT + GAP_Y)
    width = LEFT + 2 * (WIDTH + GAP_X)
    height = foot + 20 * (-(-len(names) // 3) + 1)
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           'font-family="sans-serif">')
    yield f'<rect width="{width}" height="{height}" fill="#fff"/>'
    yield text(width / 2, 18, "Attention, TOPS over tokens: " + title, size=13)
    for i, (d, causal) in enumerate(sorted(panels)):
        x0, y0 = LEFT + i % 2 * (WIDTH + GAP_X), TOP + i // 2 * (HEIGHT + GAP_Y)
        name = f"head dimension {d}" + (", causal" if causal == "yes" else "")
        yield from panel(x0, y0, name, panels[d, causal], tokens, top)
    yield from legend(names, foot)
    yield "</svg>"


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    panels, title = read(sys.argv[1])
    if not panels:
        sys.exit(f"plot_attn.py: {sys.argv[1]}: no rows named grid")
    target = sys.argv[2] if len(sys.argv) > 2 else "docs/bench_attn.svg"
    with open(target, "w") as file:
        print("\n".join(draw(panels, title)), file=file)


if __name__ == "__main__":
    main()
